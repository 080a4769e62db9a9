"""Ways to look at a Plan: as text, beside another, as a figure, as the list that a serving engine reads."""
