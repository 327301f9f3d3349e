"""Costs of layers: FLOPs, bytes and seconds, described on torch's meta device or measured."""
