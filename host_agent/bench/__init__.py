"""`balloon bench`: the project's figures, each as a ratio to a plain loop in the same run."""
