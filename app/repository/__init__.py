"""Every SQL statement of the service: about quotes and bars, about rollups, about the store itself."""
