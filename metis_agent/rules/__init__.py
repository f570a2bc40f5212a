"""What holds in every turn, whatever hosts the loop: both hosts import these rules, and they import neither."""
