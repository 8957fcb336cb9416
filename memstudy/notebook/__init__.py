"""memstudy in a notebook: cell magics that measure or predict a cell, and widgets that try settings."""
