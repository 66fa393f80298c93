"""Tables of states, from files and data frames and to them."""
