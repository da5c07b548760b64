"""One method for each named query: parameters in, rows out. No policy lives here."""
