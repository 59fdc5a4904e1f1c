"""Neighbourhood attention: every query reads the cells around it."""
