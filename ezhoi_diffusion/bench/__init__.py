"""What a bridge costs on this machine and how near few evaluations come to many, beside the guide's own system."""
