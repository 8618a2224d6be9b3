"""Islands: where a job runs. Launchers know no mathematics, and no stage imports them."""
