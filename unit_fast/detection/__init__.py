"""Boxes, matching of queries to objects, and the losses of detection (SPEC 2)."""
