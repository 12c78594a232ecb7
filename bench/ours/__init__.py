"""Our side of the comparison: the same worker as its peers have, written for `workers`."""
