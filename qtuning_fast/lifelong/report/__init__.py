"""What a run learned, for people: tables, pictures and one page."""
