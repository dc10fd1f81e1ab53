"""msfusion trains models larger than any of the machines that train them."""
