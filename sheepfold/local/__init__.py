"""What one client does in one round: its rows, its steps, its optimizer, its local rule."""
