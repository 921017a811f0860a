"""The device that training runs on, the cards that it may be asked for, and who else uses it."""
