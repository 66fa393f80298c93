"""Databases of points, behind one protocol: they know no users and no states."""
