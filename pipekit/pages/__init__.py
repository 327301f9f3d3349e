"""Pages of HTML about plans and runs, which open offline in any browser."""
