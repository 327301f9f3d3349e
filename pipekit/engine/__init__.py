"""Pipeline module, schedule executor and engines, with saving and loading of their states."""
