"""What somebody sees who sits before a terminal: bars and tables. A pipe, a file and a log get plain lines."""
