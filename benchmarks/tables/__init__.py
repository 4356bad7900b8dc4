"""Tables of the pages, each made of a result."""
