"""A quote: its fields, the rules it keeps, the terms it is taken on, and the batch that a request becomes."""
