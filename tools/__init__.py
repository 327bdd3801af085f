"""Programs for those who work on Penstock: checks, generators, training; the package imports none of them."""
