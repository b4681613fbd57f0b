"""Native model classes with the checkpoints' own tensor names, and the loader."""
