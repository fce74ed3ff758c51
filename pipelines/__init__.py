"""What a pipeline is: its declaration, its three stages and its engine. Knows neither HTTP nor gRPC."""
