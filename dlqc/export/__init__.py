"""Writers for formats that other engines read."""
