"""Pages that hold everything they show: HTML pieces and charts, with no word of what they say."""
