"""Code that only one study needs, one package for each study."""
