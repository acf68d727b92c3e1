"""Losses written as SymPy expressions: read, evaluated by torch, and differentiated by SymPy.

Importing any of these modules imports SymPy (a third of a second), so the library does it only when it is asked to
verify equations.
"""
