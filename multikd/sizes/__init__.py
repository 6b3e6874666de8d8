"""How large a student has to be: sizes from small up, until the score levels off."""
