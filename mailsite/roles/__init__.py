"""What each role contributes to a host: one module per role, each a pure function of site data."""
