"""HTTP: routes, their parameters and answers, and problems."""
