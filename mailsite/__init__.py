"""The site model and everything that is computed from it. Never imports Pulumi."""
