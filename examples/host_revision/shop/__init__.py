"""An application that keeps its orders and their sagas in one database."""
