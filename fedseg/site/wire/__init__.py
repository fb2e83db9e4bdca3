"""What gate and site service say to each other: `site.proto`, and the code generated from it."""
