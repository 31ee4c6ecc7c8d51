"""What runs on an accelerator: data, trials, evaluation, merge. Imports only ``cluster`` of ours."""
