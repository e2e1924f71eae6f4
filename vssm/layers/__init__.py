"""Layers shared by the backbones and networks; each takes its routes and sizes as arguments and knows no model."""
