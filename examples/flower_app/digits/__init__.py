"""An ordinary Flower app: images of digits, a small network. What msfusion adds to it is marked with `# msfusion`."""
