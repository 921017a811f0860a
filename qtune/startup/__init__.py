"""What must happen before torch is imported."""
