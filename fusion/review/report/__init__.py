"""The report: many run folders in one page. Reads files only."""
