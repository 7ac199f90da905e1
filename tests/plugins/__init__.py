"""Files as users write them to route their own way: each registers one router."""
