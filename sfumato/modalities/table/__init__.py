"""Tables: columns of numbers, categories and dates, with missing cells."""
