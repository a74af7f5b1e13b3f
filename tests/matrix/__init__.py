"""The service on servers, databases and roles that others have set up: `make matrix`."""
