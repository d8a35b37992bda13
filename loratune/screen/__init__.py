"""What is drawn for a person, with rich. Functions here take finished values and a console; they decide nothing."""
