"""Programs that show the library at work; none of them is part of the package."""
