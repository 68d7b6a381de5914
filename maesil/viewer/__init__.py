"""A look at a store in a browser: pages on this machine's own address, for one person, read only."""
