"""From a hospital's files to the patches that a network is trained on."""
