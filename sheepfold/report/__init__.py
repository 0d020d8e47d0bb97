"""One HTML file about runs: read (facts), compared (compare), drawn (figures), written (page), served (live)."""
