"""How final networks do at other hospitals, under simulated shifts, and whether they know when they fail."""
