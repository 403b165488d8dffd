"""What is in memory, within a budget: the books and the bank, and the line of those who wait for room."""
