"""The bottom: errors, values, configuration, and what shows and reports them."""
