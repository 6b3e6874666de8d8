"""What a run will cost, from shapes alone: parameters, memory, FLOP, and predicted speed."""
