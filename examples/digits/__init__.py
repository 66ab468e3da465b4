"""SGD against ABSGD on scikit-learn's digits: `make demo`."""
