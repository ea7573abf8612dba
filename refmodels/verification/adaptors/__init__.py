"""Packages whose implementations can be verified as they are: one module for each."""
